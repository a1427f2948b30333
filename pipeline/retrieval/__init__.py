"""FAISS indexes of stored embeddings, search, and near-duplicates.

It knows stored embeddings. It does not know how a run made them, except for their recipe.
"""
