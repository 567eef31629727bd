"""Makes drafters for a target model: data that the target writes itself, training, evaluation, checkpoints."""
