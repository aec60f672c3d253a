"""What is asked of Lightning's strategy about other processes."""
