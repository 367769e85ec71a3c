// All launchers of launch.h in one translation unit. The two parts may as well be compiled on their own, at the same
// time.
#include "launch_attend.cu"
#include "launch_codec.cu"
