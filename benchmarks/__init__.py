"""What this project measures of itself; see README.md beside this file. Not part of the installed package."""
