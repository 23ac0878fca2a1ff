"""Cards of models and datasets as the Hub reads them, and uploads that show first what would go."""
