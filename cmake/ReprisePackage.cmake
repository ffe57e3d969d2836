# `cmake --install`, and find_package(Reprise) for others.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)
set(package ${CMAKE_INSTALL_LIBDIR}/cmake/Reprise)
foreach(layer ${REPRISE_LAYERS})
  install(DIRECTORY ${PROJECT_SOURCE_DIR}/${layer} DESTINATION include/reprise FILES_MATCHING PATTERN "*.h")
  set_target_properties(reprise_${layer} PROPERTIES EXPORT_NAME ${layer})
  install(TARGETS reprise_${layer} EXPORT RepriseTargets ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
endforeach()
set_target_properties(reprise_all PROPERTIES EXPORT_NAME reprise)
install(TARGETS reprise_all EXPORT RepriseTargets)
install(TARGETS reprise RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
install(EXPORT RepriseTargets NAMESPACE Reprise:: DESTINATION ${package})
configure_package_config_file(${PROJECT_SOURCE_DIR}/cmake/RepriseConfig.cmake.in
  ${PROJECT_BINARY_DIR}/RepriseConfig.cmake INSTALL_DESTINATION ${package})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/RepriseConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/RepriseConfig.cmake ${PROJECT_BINARY_DIR}/RepriseConfigVersion.cmake
  ${PROJECT_SOURCE_DIR}/cmake/RepriseVendors.cmake DESTINATION ${package})
install(FILES ${PROJECT_SOURCE_DIR}/LICENSE DESTINATION ${CMAKE_INSTALL_DOCDIR})
