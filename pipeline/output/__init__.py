"""What is stored: names, parts, run.json, lease, ledger, stored rows.

It knows files and Parquet. It does not know how an embedding is computed.
"""
