"""What every recipe shares: arguments, data, models, tuning, batching, metrics, trainer and reports."""
