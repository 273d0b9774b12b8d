"""The checks of the exercises, one module per task. Each module has a `CHECK` with the steps of the check."""
