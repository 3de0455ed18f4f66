"""How the demo models are made: tasks, tokenizers, models, training, export."""
