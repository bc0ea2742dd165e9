"""Messages in and out: transport, durable accept, typed client, AsyncAPI description."""
