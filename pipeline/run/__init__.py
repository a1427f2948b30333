"""Passes over the flow until all is stored; tally, timeline and report.json.

It knows when to go on and when to give up. It does not know how a part is made.
"""
