# Language, warnings, sanitizers, ccache.
set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "" FORCE)
endif()
set(CMAKE_CXX_FLAGS_RELEASE "-O2")

find_program(REPRISE_CCACHE ccache)
if(REPRISE_CCACHE)
  # A fresh clone in another folder finds what this one compiled.
  foreach(language CXX CUDA)
    set(CMAKE_${language}_COMPILER_LAUNCHER ${CMAKE_COMMAND} -E env
        CCACHE_BASEDIR=${PROJECT_SOURCE_DIR} CCACHE_NOHASHDIR=1 ${REPRISE_CCACHE})
  endforeach()
endif()

# Contraction would make results depend on the target that run-time dispatch chooses.
add_library(reprise_flags INTERFACE)
target_compile_options(reprise_flags INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wshadow=local -ffp-contract=off>)
if(REPRISE_WERROR)
  target_compile_options(reprise_flags INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Werror>)
endif()
if(REPRISE_SANITIZE)
  add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-fsanitize=${REPRISE_SANITIZE}> -fno-omit-frame-pointer -g)
  add_link_options(-fsanitize=${REPRISE_SANITIZE})
endif()
