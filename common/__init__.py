"""Code that all recipes share: arguments, data, models, tuning, trainer, inference, reports and tools."""
