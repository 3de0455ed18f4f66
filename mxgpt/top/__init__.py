"""A live view of running services, from the metrics that they serve."""
