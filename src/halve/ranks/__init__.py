"""The processes that share one model: how they meet, what they add up and put together, and how they end together."""
