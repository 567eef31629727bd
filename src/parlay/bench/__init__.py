"""Measuring Parlay: workloads, load, environments and reports. Nothing else in the package imports this."""
