"""`parlay verify`: whether a server's output is its model's own, found out from outside."""
