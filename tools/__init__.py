"""What makes parts of the documentation out of the code. No part of the package."""
