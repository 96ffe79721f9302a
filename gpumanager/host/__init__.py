"""What the broker asks of the machine: processes, units, containers, signals."""
