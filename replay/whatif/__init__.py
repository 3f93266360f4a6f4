"""What other prompts, models, tools or code would have made of tasks that are over: simulated from their history."""
