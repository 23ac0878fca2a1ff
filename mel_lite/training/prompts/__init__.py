"""Choice of the training prompts: their order, rests, and others in place of groups without variance."""
