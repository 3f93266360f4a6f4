"""What is decided: agents, the context they decide in, and the adapters behind it. No Kafka here."""
