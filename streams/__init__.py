"""Where agents run: transactional, asynchronous stream processors on Kafka's own consumer groups."""
