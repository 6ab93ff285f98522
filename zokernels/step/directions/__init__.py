"""What z is: dense noise, masked, scaled, of low rank, or of integer weights."""
