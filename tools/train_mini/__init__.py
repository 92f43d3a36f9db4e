"""Training of the embedded model: `python -m train_mini`, in tools/ or with PYTHONPATH=tools."""
