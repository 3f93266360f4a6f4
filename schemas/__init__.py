"""What is recorded: the event models, their Avro schemas, topics, metadata and codec.

Pure: nothing here does I/O except the schema-registry client in :mod:`schemas.registry`.
"""
