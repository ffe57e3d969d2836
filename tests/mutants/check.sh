#!/bin/sh
# check.sh <program> <mutant> <gtest filter>: the tests pass on the program and fail on the mutant.
"$1" --gtest_brief=1 --gtest_filter="$3" > /dev/null 2>&1 || {
  echo "$3 does not pass on the program"
  exit 1
}
"$1" --gtest_list_tests --gtest_filter="$3" | grep -q '^  ' || {
  echo "no test is called $3"
  exit 1
}
if "$2" --gtest_brief=1 --gtest_filter="$3" > /dev/null 2>&1; then
  echo "$3 passes on the mutant $2"
  exit 1
fi
