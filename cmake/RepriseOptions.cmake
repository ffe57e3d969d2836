# Language, warnings, sanitizers, ccache.
set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "" FORCE)
endif()
# The tape's checks of itself are no asserts: they hold in Release too.
set(CMAKE_CXX_FLAGS_RELEASE "-O2 -DNDEBUG")

find_program(REPRISE_CCACHE ccache)
if(REPRISE_CCACHE)
  # A fresh clone in another folder finds what this one compiled.
  foreach(language CXX CUDA)
    set(CMAKE_${language}_COMPILER_LAUNCHER ${CMAKE_COMMAND} -E env
        CCACHE_BASEDIR=${PROJECT_SOURCE_DIR} CCACHE_NOHASHDIR=1 ${REPRISE_CCACHE})
  endforeach()
endif()

# tools/check_ptxas reads what ptxas says, beside each object.
list(PREPEND CMAKE_CUDA_COMPILER_LAUNCHER ${PROJECT_SOURCE_DIR}/tools/with_ptxas_report)

# Contraction would make results depend on the target that run-time dispatch chooses.
add_library(reprise_flags INTERFACE)
target_compile_options(reprise_flags INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wno-missing-field-initializers -Wshadow=local -ffp-contract=off>)
if(REPRISE_WERROR)
  target_compile_options(reprise_flags INTERFACE
    $<$<COMPILE_LANGUAGE:CXX>:-Werror> $<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings>)
endif()
if(REPRISE_SANITIZE)
  set(CMAKE_CXX_FLAGS_RELEASE "-O1 -g1")
  set(REPRISE_SANITIZE_OPTIONS -fsanitize=${REPRISE_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer)
  # GCC's own manual: the sanitizers make it warn of what is not so.
  target_compile_options(reprise_flags INTERFACE
    "$<$<COMPILE_LANGUAGE:CXX>:${REPRISE_SANITIZE_OPTIONS};-Wno-maybe-uninitialized>")
  add_link_options(-fsanitize=${REPRISE_SANITIZE})
endif()
