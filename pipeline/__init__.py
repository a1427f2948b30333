"""WebDataset shards in, Parquet of image embeddings out: start reading at `flow.py`."""
