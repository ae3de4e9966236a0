"""Where a step's time goes: its operations, a device's rates, throughput."""
