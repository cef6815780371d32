"""Plans, measurements, and what they are measured against."""
