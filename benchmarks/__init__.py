"""Every figure in the docs comes from here.

It runs the product and others side by side. Nothing of the product knows it.
"""
