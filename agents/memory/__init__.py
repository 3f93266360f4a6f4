"""Long-term memory in the making: documents into chunks, chunks into vectors. Keeping the vectors is a sink's part."""
