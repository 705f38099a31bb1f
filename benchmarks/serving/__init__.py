"""The merged model and the LoRA in other engines."""
