"""What a policy would do to a workload: played in virtual time, by the broker's own decisions."""
