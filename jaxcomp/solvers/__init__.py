"""One matrix problem each: arrays in, arrays out, no models."""
