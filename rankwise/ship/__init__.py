"""From a trained adapter to what runs elsewhere: merging, and the proof that the merged model is the trained one."""
