"""Logits and features as losses take them in: checked, masked, in float32 or wider."""
