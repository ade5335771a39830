"""What every other part needs: errors, files, pictures, log, seeds."""
