"""The choreography: what each message makes of an instance, one module per family."""
