"""Recurrent models: RNN, LSTM, GRU, and an LSTM encoder-decoder with attention."""
