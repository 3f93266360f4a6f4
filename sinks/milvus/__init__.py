"""The corpus as vectors in Milvus: a projection of topic ``embeddings``, and the memory that is recalled from it."""
