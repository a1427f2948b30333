"""What every room stands on: settings, Arrow schemas, errors, storage with its retries, redaction, formatting.

It knows neither what a shard holds nor what an embedding is.
"""
