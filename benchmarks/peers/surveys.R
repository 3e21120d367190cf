# What do R's packages make of surveys? Rscript surveys.R FOLDER [KS STARTS]
#
# Without KS it writes the surveys that psychotools and psychotree bring into FOLDER as CSV (person, first, second, winner,
# covariates). With KS (1,2,...) and STARTS it fits every CSV there: Bradley-Terry by psychotools::btmodel and mixtures of it by
# flexmix, with STARTS starts each, and with covariates of the weights where the file names them. Ties are left out. A line a fit
# in FOLDER/r.txt; rewards (the first item has 0) and posteriors of the best fit in FOLDER/r.

given <- commandArgs(trailingOnly = TRUE)
folder <- given[1]
has <- function(name) suppressWarnings(suppressMessages(require(name, character.only = TRUE, quietly = TRUE)))
say <- function(...) cat(..., "\n", sep = "\t", file = file.path(folder, "r.txt"), append = TRUE)
brought <- list(GermanParties2009 = "psychotools", FirstNames = "psychotools", CEMSChoice = "psychotree",
                Topmodel2007 = "psychotree")
known <- list(GermanParties2009 = c("gender", "age", "crisis"), Topmodel2007 = c("gender", "age"))
load <- function(name) {
  if (!has(brought[[name]])) return(NULL)
  data(list = name, package = brought[[name]], envir = environment())
  get(name)
}

if (length(given) == 1) {
  for (name in names(brought)) {
    survey <- load(name)
    if (is.null(survey)) next
    choice <- as.matrix(survey$preference)  # 1: the first of the pair, -1: the second, 0: a tie, NA: not asked
    pair <- do.call(rbind, strsplit(colnames(choice), ":", fixed = TRUE))
    rows <- data.frame(person = rep(seq_len(nrow(choice)), ncol(choice)),
                       first = rep(pair[, 1], each = nrow(choice)), second = rep(pair[, 2], each = nrow(choice)))
    value <- as.vector(choice)
    rows$winner <- ifelse(value > 0, rows$first, ifelse(value < 0, rows$second, "tie"))
    for (column in known[[name]]) rows[[column]] <- rep(survey[[column]], ncol(choice))
    rows <- rows[!is.na(value) & complete.cases(rows), ]
    write.csv(rows[order(rows$person), ], file.path(folder, paste0(name, ".csv")), row.names = FALSE, quote = FALSE)
  }
  quit()
}

ks <- as.integer(strsplit(given[2], ",")[[1]])
starts <- as.integer(given[3])
dir.create(file.path(folder, "r"), showWarnings = FALSE)
for (name in c("psychotools", "psychotree", "flexmix"))
  say("package", name, if (has(name)) as.character(packageVersion(name)) else "not installed")
for (path in sort(list.files(folder, "\\.csv$", full.names = TRUE))) {
  name <- sub("\\.csv$", "", basename(path))
  if (name %in% names(brought) && !is.null(survey <- load(name)) && has("psychotools"))
    say("fit", name, "btmodel", "weights", 1,
        sprintf("%.6f", as.numeric(logLik(btmodel(survey$preference, undecided = FALSE, epsilon = 1e-12)))), "")
  rows <- read.csv(path)
  rows <- rows[rows$winner != "tie", ]
  covariates <- setdiff(names(rows), c("person", "first", "second", "winner"))
  items <- sort(unique(c(rows$first, rows$second)))
  x <- outer(rows$first, items, "==") - outer(rows$second, items, "==")
  rows$won <- as.integer(rows$winner == rows$first)
  rows$lost <- 1L - rows$won
  for (i in seq_along(items)[-1]) rows[[paste0("x", i)]] <- x[, i]
  model <- paste("cbind(won, lost) ~ 0 +", paste0("x", seq_along(items)[-1], collapse = " + "))
  glm1 <- glm(as.formula(model), family = binomial(), data = rows, epsilon = 1e-12)
  say("fit", name, "glm", "weights", 1, sprintf("%.6f", as.numeric(logLik(glm1))), "")
  if (!has("flexmix")) next
  for (gate in c("weights", if (length(covariates)) "covariates")) for (k in ks) {
    if (gate == "covariates" && k == 1) next
    prior <- if (gate == "weights") FLXPconstant() else
      FLXPmultinom(as.formula(paste("~", paste(covariates, collapse = " + "))))
    set.seed(1)
    began <- proc.time()[["elapsed"]]
    best <- NULL
    for (start in seq_len(if (k == 1) 1 else starts)) {
      fit <- try(flexmix(as.formula(paste(model, "| person")), data = rows, k = k,
                         model = FLXMRglm(family = "binomial"), concomitant = prior,
                         control = list(iter.max = 2000, tolerance = 1e-10, minprior = 0)), silent = TRUE)
      if (!inherits(fit, "try-error") && (is.null(best) || logLik(fit) > logLik(best))) best <- fit
    }
    say("fit", name, "flexmix", gate, k, sprintf("%.6f", as.numeric(logLik(best))),
        round(proc.time()[["elapsed"]] - began, 1))
    rewards <- data.frame(items, rbind(0, as.matrix(parameters(best))))
    posterior <- data.frame(rows$person, posterior(best))[!duplicated(rows$person), ]
    for (part in c("rewards", "posterior"))
      write.table(get(part), file.path(folder, "r", paste(name, gate, k, part, sep = "_")),
                  sep = ",", row.names = FALSE, col.names = FALSE, quote = FALSE)
  }
}
