// All launchers of launch.h in one translation unit. The three parts may as well be compiled on their own, at the same
// time.
#include "launch_attend.cu"
#include "launch_codec.cu"
#include "launch_store.cu"
