"""The operations, one file each: schema, fake, checks, entry and the typed wrapper that users call."""
