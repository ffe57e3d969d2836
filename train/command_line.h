// Commands and flags of the program.
#pragma once

namespace reprise::train {

// Exit codes: 0 done, 1 a check or the work failed, 2 bad input (flags, files).
int run_command_line(int argc, char** argv);

}  // namespace reprise::train
