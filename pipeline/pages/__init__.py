"""All HTML and pictures.

It knows how results are shown. It computes none of them.
"""
