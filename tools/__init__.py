"""What one runs beside the scripts; the scripts never import it."""
