"""File formats → one record type → batches."""
