"""The executor: schedules requests into steps, runs a GPT model over paged KV, streams what it draws."""
