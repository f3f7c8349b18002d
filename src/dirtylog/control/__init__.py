"""How other programs steer a running machine."""
