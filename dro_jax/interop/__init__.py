"""Models of other libraries. Every module imports what it needs of them only when it is used."""
